"""What a call of DDPM passes through: the checks of its inputs, and compiled programs."""
