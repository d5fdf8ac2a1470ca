"""Single trainings in processes of their own: what a comparison and a sweep are made of."""
