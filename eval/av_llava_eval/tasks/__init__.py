"""The benchmarks, one small file each; ``task.get_task`` finds them by name."""
