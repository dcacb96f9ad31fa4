"""`easgd-compare` and `easgd-plot`: training methods beside each other, with equal budgets and their own tuning."""
