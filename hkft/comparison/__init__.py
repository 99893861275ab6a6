"""Methods against each other over seeds: the grid, the statistics, the tables."""
