"""The Flower ServerApp of FRAMP: strategies, client registry and run recording."""
