"""Planning of a job: memory, time and layouts, preflight checks, and Slurm scripts."""
