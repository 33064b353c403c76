"""Tasks, mixtures and files of the user's own: prepared and verified, encoded, and dealt out to the steps of a run."""
