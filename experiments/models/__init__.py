"""Networks, the LightningModules that train them, and the operations that they take."""
