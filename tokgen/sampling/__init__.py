"""Drawing tokens: the decode driver, guidance schedules, filters; for any generator."""
