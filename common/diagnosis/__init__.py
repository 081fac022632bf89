"""What `torchrelay doctor` looks at that needs neither gateway nor worker."""
