"""Whether this machine computes right and fast what a run would compute, before the run."""
