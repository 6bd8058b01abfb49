"""The report: one self-contained page that tells the story of a run, and the tree of models of a folder of runs."""
