"""One file a loss, made of the statistics that ``ops.fold`` gives."""
