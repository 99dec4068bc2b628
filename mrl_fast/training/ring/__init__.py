"""Losses over the rows of all ranks with none gathered: pieces of them travel from rank to rank."""
