"""`data.format: labelled`: texts, pairs of texts or words of a text, with classes or scores."""
