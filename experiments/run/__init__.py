"""One run: training, its budget, its results and its picture."""
