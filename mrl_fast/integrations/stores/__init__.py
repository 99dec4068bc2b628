"""What vector stores over an index share: records, their journal, and filters."""
