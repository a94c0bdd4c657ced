"""Search over candidate algorithms, the store of winners, and the look-up."""
