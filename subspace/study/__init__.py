"""Fair comparisons of methods: an equal search for each, fresh seeds for the finals, one scoring, one table."""
