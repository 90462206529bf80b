"""Running the model on many pictures and questions."""
