#!lua flags=allow-oom
-- Deletes a dead letter: its job, its log and its idempotency key.
-- ARGV  1 id
-- Reply 1, or 0 if it is no dead letter (any more): also to a repeat, since the first call left nothing to know it by.
--@include base
--@include jobs
if call('ZREM', P .. 'failed', ARGV[1]) == 0 then return 0 end
local existed = call('EXISTS', P .. 'j:' .. ARGV[1])
erase(ARGV[1])
return existed
