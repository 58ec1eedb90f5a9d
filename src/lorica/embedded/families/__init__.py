"""The tasks, a file a family; a class that fills in `AbstractTask` is found by walking here."""
