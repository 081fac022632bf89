#!lua flags=allow-oom
-- The list of batches that run, {batches}:active, by when somebody is to look at them: at the end of their feeders' leases.
-- ARGV  1 most to return  then pairs: a batch, and in how many ms it is to be looked at, or '' if it has ended
-- Reply {batch ...}, those that are due
local call = redis.call
local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
for i = 2, #ARGV, 2 do
  if ARGV[i + 1] == '' then
    call('ZREM', KEYS[1], ARGV[i])
  else
    call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[i + 1]), ARGV[i])
  end
end
if tonumber(ARGV[1]) == 0 then return {} end
return call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now), 'LIMIT', 0, ARGV[1])
