"""What 'ovbench profile' runs."""
