"""An index on disk: a folder of immutable files and one manifest."""
