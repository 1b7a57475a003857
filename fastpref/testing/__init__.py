"""Tools for testing against fastpref: worker ranks, the numeric rule, adversarial inputs, fault points."""
