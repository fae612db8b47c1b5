"""Parts of estimate_memory: models and runs to plan for, the tables, and the check against measured peaks."""
