"""The main job, end to end: nested vectors for the documentation of installed packages are trained,
evaluated, indexed, searched, and asked questions in words."""
