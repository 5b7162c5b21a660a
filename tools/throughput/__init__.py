"""What limits a run on this machine: each stage measured alone and together, a verdict, a page."""
