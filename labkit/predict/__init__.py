"""What a machine that is not here would do: hardware and model tables, a dry run, a cost model, a planner."""
