"""The hardware a program runs on: device meshes, processes, jax's settings, the progress bar."""
