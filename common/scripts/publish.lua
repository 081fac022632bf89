#!lua
-- Publishes a model card, once all its files are stored. KEYS[1] is {models}:cards.
-- ARGV  1 shard  2 card  then SHA-256 of each file
-- Reply: the files that are missing (nothing was changed then), or an empty array.
local P = '{models}:'
local missing, files = {}, {}
for i = 3, #ARGV do
  files[i - 2] = ARGV[i]
  if redis.call('EXISTS', P .. 'b:' .. ARGV[i]) == 0 then missing[#missing + 1] = ARGV[i] end
end
if #missing > 0 or redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then return missing end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('HSETNX', P .. 'times', ARGV[1], time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('HSET', P .. 'files', ARGV[1], table.concat(files, ' '))
redis.call('INCR', P .. 'version')
return missing
