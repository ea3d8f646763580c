"""Grids of many runs: their records, their statistics and the tables made from them."""
