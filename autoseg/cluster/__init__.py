"""Processes beside this one: on this machine, or as jobs of Slurm."""
