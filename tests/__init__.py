"""The tests of llama_moe: unit (no model), native (the core), integration (models and placements), e2e (as a user has it)."""
