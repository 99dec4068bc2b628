"""The main job, end to end: nested vectors of the documentation of what is installed, trained,
evaluated, indexed, searched, and asked in words."""
