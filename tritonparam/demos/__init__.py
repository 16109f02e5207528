"""Small trainings that show what fusing a chain changes, and that it changes nothing else."""
