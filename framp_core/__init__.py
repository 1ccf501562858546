"""The FRAMP method in PyTorch and NumPy. Nothing in this package imports Flower."""
