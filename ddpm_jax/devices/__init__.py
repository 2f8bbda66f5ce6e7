"""What a program runs on: the mesh of devices, the processes of several hosts, jax's settings, the progress bar."""
