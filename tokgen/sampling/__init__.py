"""Drawing tokens: the decode driver, guidance schedules, samplers; for any generator."""
