"""Class lists, sentences and their embeddings."""
