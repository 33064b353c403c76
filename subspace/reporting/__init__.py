"""Result tables with intervals, paired comparisons, plots, and the report on a mixture's data."""
