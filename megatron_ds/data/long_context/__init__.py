"""`data.long_context`: samples in given shares from documents of given lengths, one module for each step."""
