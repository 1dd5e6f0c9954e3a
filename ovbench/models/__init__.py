"""What turns names into a network and images into labels."""
