"""What a person looks at: slices, masks, embeddings and plots, in one visual style."""
