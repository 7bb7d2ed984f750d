"""IC-MoE: the experts, the router, the voting, and the frozen backbone they stand on."""
