#!lua flags=allow-oom
-- Deletes a model card, and its files where no other card names them. KEYS[1] is {models}:cards.
-- ARGV  1 shard
-- Reply 1 if there was one.
local P = '{models}:'
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
local files = redis.call('HGET', P .. 'files', ARGV[1]) or ''
redis.call('HDEL', P .. 'files', ARGV[1])
redis.call('HDEL', P .. 'times', ARGV[1])
local used = table.concat(redis.call('HVALS', P .. 'files'), ' ')
for file in string.gmatch(files, '%S+') do
  if not string.find(used, file, 1, true) then redis.call('DEL', P .. 'b:' .. file) end
end
redis.call('INCR', P .. 'version')
return 1
