"""What training costs, dense and converted: memory and step time on one GPU, and on several."""
