"""What needs a machine with a GPU: ``run.sh`` is the one command."""
