"""Whether SP helps its hosts, as a table that one command makes: `python -m wherefrom.tools.evidence`."""
