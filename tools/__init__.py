"""The command line, measuring and looking; nothing imports this folder.

Here: one module a sub-command (training, views_picture, prove, index, bench_loader), reached through `cli.main`.
"""
