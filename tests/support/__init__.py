"""What tests are made of: doubles of what they cannot have, and checks that several of them use."""
