"""From rows of text to batches of token numbers."""
