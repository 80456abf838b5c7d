"""What a run would read: counts, lengths, and samples as text with the tokens that carry loss marked."""
