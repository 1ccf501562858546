"""The Flower ClientApp of FRAMP: descriptor query, train and evaluate."""
